"""What every kernel needs around it: Triton's language, operand checks, targets, tuning, compilation."""
