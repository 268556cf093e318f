"""clawdemy-infer: predict the cost of LLM inference, measure it, explain the difference."""

__version__ = "0.1.0"
