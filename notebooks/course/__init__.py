"""The content of the lessons that needs Python: their build tasks, exercises and diagrams."""
