"""Files that an exported model takes along; none of them imports this package."""
