"""What a service returned -> tables and text, or JSON."""
