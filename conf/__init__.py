"""Hydra configuration groups; from another project: ``hydra.searchpath: [pkg://gspo_lightning.conf]``."""
