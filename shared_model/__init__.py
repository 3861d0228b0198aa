"""What every party must agree on: pure numerics and the study description."""
