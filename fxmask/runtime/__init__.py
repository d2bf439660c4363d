"""The accelerated model: which step, which lane, which graph, which caches."""
