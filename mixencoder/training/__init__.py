"""Train models (`run`: batches, losses and transformers' Trainer) and mine hard negatives for them (`mining`)."""
