"""The training loop: trainer, optimizer, schedules, balance of expert load, evaluation."""
