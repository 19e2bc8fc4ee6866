"""Images drawn with known text: lines, code, tables, formulas and web pages, each from its number alone."""
