// The visible texts of a page whose contrast is below WCAG's AA: 4.5, or 3 for
// large letters.
() => {
  const numbers = (color) => {
    const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], [R, G, B]) => [
    r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1,
  ];
  const luminance = (color) => {
    const [r, g, b] = color.map((x) => {
      x /= 255;
      return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    if (!element) return [255, 255, 255, 1];
    const color = numbers(getComputedStyle(element).backgroundColor);
    if (color[3] === 1) return color;
    return over(color, background(element.parentElement));
  };
  const opacity = (element) =>
    element
      ? getComputedStyle(element).opacity * opacity(element.parentElement)
      : 1;
  const poor = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim();
    const element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility({ visibilityProperty: true })) continue;
    const { color, fontSize, fontWeight } = getComputedStyle(element);
    const paper = background(element);
    const ink = numbers(color);
    ink[3] *= opacity(element);
    if (!ink[3]) continue; // Until one points at it.
    const pair = [luminance(over(ink, paper)), luminance(paper)];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const points = parseFloat(fontSize) * 0.75;
    const isLarge = points >= 18 || (points >= 14 && fontWeight >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) {
      poor.add(`${element.className || element.tagName}: ${ratio.toFixed(2)}`);
    }
  }
  return [...poor];
}
