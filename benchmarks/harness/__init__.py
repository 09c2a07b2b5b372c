"""How it is measured: clocks, memory, machine; and how it is kept: rows of a CSV file, tables."""
