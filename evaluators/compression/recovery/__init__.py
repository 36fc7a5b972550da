"""What wins quality back after compression: statistics, rounding, corrections, distillation, reparameterisations."""
