"""How the shipped draft was trained."""
