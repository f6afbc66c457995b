"""What makes a program of the library: commands, the run's folder, its processes, threads and memory. No torch here."""
