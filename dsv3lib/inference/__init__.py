"""Using a trained model: sampling, and speculation with the MTP modules."""
