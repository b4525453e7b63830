"""Pure tensor functions: what is optimised, and nothing about models or sampling."""
