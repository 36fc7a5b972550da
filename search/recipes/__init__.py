"""Recipes: published methods of compression, each a short declaration of its parts."""
