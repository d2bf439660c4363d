"""Files that last: replaced as a whole, locked, bounded before they are parsed, with one digest over what they say."""
