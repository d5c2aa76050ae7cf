"""One module for each command of the console command `clipdense`; `clipdense.run.cli` lists them."""
