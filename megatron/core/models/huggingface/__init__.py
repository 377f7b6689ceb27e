"""Exchange with Hugging Face: families as data, a plan of weights, files. No group, no model."""
