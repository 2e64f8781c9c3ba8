"""Conformance helpers that others can run: the tolerance rule, later oracles and skewed inputs."""
