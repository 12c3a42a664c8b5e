"""What models compute on the way: read, sketched, kept in files, and how ports are found."""
