"""What looks at everything else: benchmarks, diagnosis, pictures, the command line."""
