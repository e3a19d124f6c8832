"""The shapes world: scenes and captions, damaged pictures, prompt files, and tokenizers of its words."""
