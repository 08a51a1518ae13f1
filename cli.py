"""Start the command line from a checkout: `python cli.py …` is `mbf …`."""

from mbf_mlx.commands import main

if __name__ == "__main__":
    main()
