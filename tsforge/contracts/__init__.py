"""The types that flow between rooms: tensors for models, tables for people."""
