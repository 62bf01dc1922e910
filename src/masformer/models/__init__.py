"""The bridge to Hugging Face transformers."""
