"""What a run costs, measured against what the machine can do."""
