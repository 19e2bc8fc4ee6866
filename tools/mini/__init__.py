"""The papers in miniature: their data, their ablations, and the pages that say what came of them."""
