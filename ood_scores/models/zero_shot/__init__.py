"""Zero-shot classifiers: the image and text encoders of CLIP and SigLIP, and what is built from them."""
