"""`python -m lora_ogpsa`: the command line."""

from lora_ogpsa.cli import main

main()
