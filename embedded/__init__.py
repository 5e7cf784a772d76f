"""How the embedded tiny Llama and its reference SAE are made."""
