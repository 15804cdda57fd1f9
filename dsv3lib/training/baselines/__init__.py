"""What a trained model is measured against: n-grams, compressors, a dense twin of equal active parameters."""
