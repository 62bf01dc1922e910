"""The model `masformer` of lm-evaluation-harness; to import `harness.model` needs the extra `lm-eval`."""
