"""The pipeline runtime: a schedule's actions carried out by real processes, on torch.distributed alone."""
