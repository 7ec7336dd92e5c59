"""LLaVAs: of Hugging Face, of LLaVA's own code, and as XTuner keeps them."""
