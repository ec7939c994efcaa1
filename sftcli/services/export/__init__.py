"""Write a trained model for other programs: ``request`` names it and needs no torch, ``export`` writes it."""
