"""Textured objects from formulas: surfaces (shape), patterns (colour), bake (light, texture), families (objects)."""
