"""Layouts, meshes and the sharding of modules. Imports nothing from models, data or engine."""
