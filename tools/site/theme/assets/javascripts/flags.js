// Search reads a leading dash as "without this word", so a flag such as --max-reject-ratio would find nothing.
document.addEventListener(
  "input",
  (event) => {
    const field = event.target
    if (field.matches("[data-md-component=search-query]")) {
      const bare = field.value.replace(/(^|\s)-+/g, "$1")
      if (bare !== field.value) field.value = bare
    }
  },
  true,
)
