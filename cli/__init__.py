"""The command line `mgg-edge`: one command a file, no logic of its own."""
