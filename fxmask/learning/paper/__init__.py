"""The learner of arXiv 2603.19939."""
