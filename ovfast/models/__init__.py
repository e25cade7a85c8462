"""SigLIP tower, projector and Qwen2, and the model that joins them."""
