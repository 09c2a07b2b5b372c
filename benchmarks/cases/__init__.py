"""What is measured: cases, and the presets that list them."""
