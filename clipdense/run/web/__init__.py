"""Web page for segmentation into typed words: `clipdense serve`."""
