"""What a checkpoint is worth: measures of drawn digits, charts and sheets."""
