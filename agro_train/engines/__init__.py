"""What samples completions: transformers or vLLM. A new engine is one file with `engine.Engine`."""
