"""How the playground was made: npm pictures in, a small trained SD3.5 out. Nothing at run time imports this."""
