"""The only room that loads diffusers, transformers, peft and quanto."""
