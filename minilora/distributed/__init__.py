"""Connects the processes of a run that torchrun started, and shards the model over them with FSDP2."""
