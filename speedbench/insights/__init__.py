"""What the benchmark was made to find out: analyses of stored runs, each with its assumption."""
