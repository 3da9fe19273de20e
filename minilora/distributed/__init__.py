"""The processes of a run that torchrun started, and FSDP2."""
