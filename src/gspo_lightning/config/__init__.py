"""From a composed config to checked settings and the objects they name."""
